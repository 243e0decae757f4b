// The values under the pointer. They come from the attribute data-curves and are set as text, never as markup.
const add = (to, tag, text, colour) => {
  const made = document.createElement(tag);
  if (colour) made.style.setProperty('--k', colour);
  if (text) made.textContent = text;
  to.append(made);
  return made;
};

// The index of the value of xs nearest to x.
const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
};

// Where the line stands, the heading, and the rows of (text, colour), for a pointer at a share of the width.
const pointed = (data, share) => {
  const wanted = data.first + share * (data.last - data.first);
  const found = data.curves.map(curve => [curve, nearest(curve.x, wanted)]);
  const steps = found.map(([curve, at]) => curve.x[at]);
  const step = steps.reduce((best, x) => Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best);
  const rows = found.filter(([curve, at]) => Math.abs(curve.x[at] - step) <= curve.gap)
    .map(([curve, at]) => [curve.n + '  ' + curve.t[at], 'var(--c' + curve.c + ')']);
  const head = data.step.replace('#', Math.round(step).toLocaleString('en'));
  return [(step - data.first) / (data.last - data.first), head, rows];
};

for (const area of document.querySelectorAll('[data-curves]')) {
  const data = JSON.parse(area.dataset.curves);
  const tip = area.querySelector('.tip'), line = area.querySelector('.cursor');
  const show = event => {
    const box = area.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const [place, head, rows] = pointed(data, share);
    tip.replaceChildren();
    add(tip, 'div', head);
    for (const [text, colour] of rows) {
      const row = add(tip, 'div');
      add(row, 'i', '', colour);
      row.append(text);
    }
    const x = place * 100;
    line.style.left = x + '%';
    tip.style.left = x < 50 ? 'calc(' + x + '% + 10px)' : 'auto';
    tip.style.right = x < 50 ? 'auto' : 'calc(' + (100 - x) + '% + 10px)';
    line.hidden = tip.hidden = false;
  };
  area.addEventListener('pointermove', show);
  area.addEventListener('pointerdown', show);
  area.addEventListener('pointerleave', () => { line.hidden = tip.hidden = true; });
}
