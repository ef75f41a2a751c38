"""The evaluator's benchmark runs at a tiny size."""

from bench import evaluate


def test_it_prints_time_and_memory(monkeypatch, capsys):
    for name, value in {"QUERIES": 5, "GALLERY": 40, "CHANNELS": 4, "IDENTITIES": 3}.items():
        monkeypatch.setattr(evaluate, name, value)
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cosine: 5 x 40 features of 4: ")
    assert lines[1].startswith("euclidean: ")
    assert lines[2].endswith(" GiB")
