"""``unigen ckpt``: what checkpoints a run has, whether they are whole, and one of them as a folder in the
published layout.

One process, no accelerator, no process group: a checkpoint says itself how many processes wrote it and what
lies where.
"""

from __future__ import annotations

import json
from pathlib import Path

from unigen.commands.ckpt.options import CkptOptions
from unigen.config import UserError, nearest
from unigen.messages import in_language

_TAKES = {
    "ls": ("one folder: unigen ckpt ls RUN", 1, 1),
    "verify": ("folders: unigen ckpt verify CHECKPOINT_OR_RUN ...", 1, 1 << 30),
    "export": ("two folders: unigen ckpt export CHECKPOINT_OR_MODEL NEW_FOLDER", 2, 2),
}
"""Action -> what it takes in words, how many folders at least and at most."""
_PLAIN = "there are no checksums here: headers and lengths of the weights were compared, bytes were not read"


def run(options: CkptOptions) -> int:
    """Runs the command: 0 for success, 1 where ``verify`` found damage.

    Raises:
        UserError: an unknown action, a wrong number of folders, or an export that cannot be made.
    """
    action, *folders = options.paths or [""]
    if action not in _TAKES:
        found = nearest(action, list(_TAKES))
        said = f"{action!r} is none of them" if action else "nothing was said"
        raise UserError(
            f"unigen ckpt: say what to do: {', '.join(_TAKES)};"
            f" {said}{f'; did you mean {found}?' if found else ''}"
        )
    takes, fewest, most = _TAKES[action]
    if not fewest <= len(folders) <= most:
        raise UserError(f"unigen ckpt {action} takes {takes}; found {len(folders)}")
    if action == "ls":
        from unigen.commands.ckpt.listing import list_checkpoints

        return list_checkpoints(Path(folders[0]), options.json)
    if action == "verify":
        return verify(list(map(Path, folders)), options.json)
    from unigen.commands.ckpt.export import export

    export(Path(folders[0]), Path(folders[1]), options)
    return 0


def verify(folders: list[Path], as_json: bool = False) -> int:
    """Reads every byte of checkpoints, of all of a run's, or of exports, and prints ``OK`` or every problem;
    1 where there is one. Of a model without checksums headers and lengths are compared.

    Raises:
        UserError: a folder is not there, or holds no checkpoints.
    """
    from unigen.commands.ckpt.listing import checkpoints_of, must_be_folder
    from unigen.commands.ckpt.verify import is_plain, problems_of, receipt_of
    from unigen.show.terminal import say

    found: dict[str, list[str]] = {}
    for folder in folders:
        must_be_folder(folder)  # a name that is wrong is told before bytes are read
    for folder in folders:
        one = receipt_of(folder) is not None or is_plain(folder)
        inside = [folder] if one else checkpoints_of(folder)
        checkpoints = [path for path in inside if not path.name.startswith(".")]
        if not checkpoints:
            raise UserError(
                f"{folder} holds no checkpoints. Fix: name a step_N folder, or the folder of a run"
            )
        for checkpoint in checkpoints:
            problems = problems_of(checkpoint)
            found[str(checkpoint)] = problems
            if not as_json:
                state = in_language("damaged" if problems else "OK")
                notes = map(in_language, [_PLAIN] * is_plain(checkpoint) + problems)
                say("\n  ".join([f"{checkpoint}: {state}", *notes]))
    if as_json:
        print(json.dumps(found, indent=1))
    return 1 if any(found.values()) else 0
