"""The line at a stage's end."""

from speeder.training.progress import stage_line


def line(*ranked: float, last: bool) -> str:
    log = [{"loss": 3.0, "step": 1}, *({"eval_NDCG@10": value, "step": 2} for value in ranked), {"step": 9}]
    return stage_line("joint", log, 12.4, last)


def test_the_last_stage_tells_whether_it_was_still_improving():
    assert line(0.1, 0.2, last=True).endswith(
        "best validation NDCG@10 0.2000, still rising at the last step: more epochs may help"
    )
    assert line(0.2, 0.1, last=True).endswith("best validation NDCG@10 0.2000")
    assert line(0.2, last=True).endswith("0.2000"), "one figure shows no direction"
    assert line(0.1, 0.2, last=False).endswith("0.2000"), "later stages begin anew"
    assert line(last=True) == "joint: 9 steps in 12 s, loss 3.000"
