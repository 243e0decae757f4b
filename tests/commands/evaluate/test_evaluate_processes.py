"""Several processes share an evaluation, and kills change nothing (``benchmarks/evaluate_kills.py`` kills
oftener)."""

import evaluate_kills as kills
import pytest


@pytest.mark.slow
def test_two_processes_and_kills_end_with_the_same_bytes_as_one_process(golden, tmp_path):
    data = kills.write_records(tmp_path / "data", 3)
    whole, killed = (
        kills.Evaluation(golden / "model", data, tmp_path / name) for name in ("whole", "killed")
    )
    whole.start(1)
    whole.finish()
    moments = kills.kill_again_and_again(killed, whole.files, 2, seed=3)  # two processes, one, then two
    assert len(moments) == 2 and moments[0].startswith("2") and moments[1].startswith("1")
    assert kills.differing(killed, whole) == []
    parts = [path.name for path in (killed.out / "batches").iterdir()]
    assert sorted(parts) == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
