"""What the README shows must run."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loop_has_under_25_lines_and_runs(capsys):
    loop = EXAMPLES[0]
    assert len(loop.splitlines()) < 25
    scope = {}
    exec(loop, scope)
    assert scope["embedding"].shape == (16, 512)
    assert scope["head"].memory.norm(dim=2).sum() > 0


def test_the_kernels_run_on_a_chosen_backend():
    scope = {}
    exec(EXAMPLES[1], scope)
    assert scope["revised"].shape == (8, 10)
    assert scope["local_features"].shape == (8, 3, 64)


def test_every_recipe_is_named():
    from cge_fast.options import recipes

    for name in recipes():
        assert f"`{name}`" in README
