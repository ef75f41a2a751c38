"""The host's time of a step of every operator, in turns with eager PyTorch; no time is asserted."""

import torch

from bench import host
from bench.cases import CASES, EAGER, OURS


def test_every_case_is_timed_and_without_a_gpu_the_output_says_so(capsys):
    figures = list(host.measure(rounds=2))
    assert [(figure.subject, figure.contender) for figure in figures] == [
        (str(case), contender) for case in CASES for contender in (OURS, EAGER)
    ]
    assert all(0 < figure.low <= figure.value <= figure.high for figure in figures)
    if not torch.cuda.is_available():
        assert "kernels are not run" in capsys.readouterr().out
        assert {figure.setting for figure in figures} == {"tiny, float32, kernels not run"}
