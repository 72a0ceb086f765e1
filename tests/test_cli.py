"""The command line, run in this process; one line on standard error when something is wrong."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimistral import cli, load_model, train_command

SMALL = "--dim 16 --layers 1 --heads 2 --vocab-size 280 --seq-len 16 --batch-size 2 --device cpu".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "song.txt"
    path.write_text("il était un petit navire, qui n'avait jamais navigué. " * 40, encoding="utf-8")
    return path


def train(text, out, *options) -> int:
    return cli.main(["train", "--corpus", str(text), "--out", str(out), *SMALL, *options])


@pytest.fixture(scope="module")
def trained(text) -> Path:
    out = text.parent / "trained"
    assert train(text, out, "--steps", "4") == 0
    return out


def refused(capsys, *command) -> str:
    """The one line that a wrong command gets; its exit status is 2 and nothing is printed."""
    capsys.readouterr()
    assert cli.main([str(part) for part in command]) == 2
    out, error = capsys.readouterr()
    line = error.strip().splitlines()[-1]  # a progress line may stand before it
    assert line.startswith("minimistral: ") and "Traceback" not in error and not out
    return line


def test_training_leaves_a_whole_model(trained):
    files = {path.name for path in trained.iterdir()}
    assert files == {
        "params.json", "consolidated.safetensors", "tekken.json", "record.json", "settings.json"
    }
    record = json.loads((trained / "record.json").read_text("utf-8"))
    assert len(record["losses"]) == 4 and record["evaluations"][-1][0] == 4
    assert load_model(trained).config.vocab_size == 280


def test_training_on_experts_with_a_window(text, tmp_path, capsys):
    assert train(text, tmp_path / "moe", "--steps", "2", "--experts", "3", "--window", "5",
                 "--kv-heads", "1", "--hidden", "24") == 0
    config = load_model(tmp_path / "moe").config
    assert (config.moe.num_experts, config.moe.num_experts_per_tok) == (3, 2)
    assert (config.sliding_window, config.n_kv_heads, config.hidden_dim) == (5, 1, 24)
    assert "It writes:" in capsys.readouterr().out


def test_minutes_become_steps(text, tmp_path):
    assert train(text, tmp_path / "timed", "--minutes", "0.01") == 0
    assert json.loads((tmp_path / "timed/settings.json").read_text("utf-8"))["steps"] >= 1


def test_a_stopped_run_goes_on_to_the_same_weights(text, trained, tmp_path, capsys, monkeypatch):
    real = train_command.mm.train

    def stopped(model, tokens, config, **options):
        """Ctrl-C after the second step, as the training loop reports it."""
        update = real.__globals__["update"]

        def interrupted(model, optimizers, step, config):
            update(model, optimizers, step, config)
            if step == 1:
                import signal

                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setitem(real.__globals__, "update", interrupted)
            return real(model, tokens, config, **options)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setitem(vars(train_command.mm), "train", stopped)
        assert train(text, out, "--steps", "4") == 130
    error = capsys.readouterr().err
    assert "stopped after step 2 of 4" in error and "--resume goes on" in error
    assert not (out / "params.json").exists()
    assert cli.main(["train", "--out", str(out), "--resume", "--device", "cpu"]) == 0
    ours, whole = load_model(out).state_dict(), load_model(trained).state_dict()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_a_folder_is_never_trained_over(text, trained, tmp_path, capsys):
    before = (trained / "consolidated.safetensors").read_bytes()
    assert "is not empty" in refused(capsys, "train", "--corpus", text, "--out", trained)
    assert "is finished" in refused(capsys, "train", "--out", trained, "--resume")
    assert "no run that was stopped" in refused(capsys, "train", "--out", tmp_path, "--resume")
    assert (trained / "consolidated.safetensors").read_bytes() == before


def test_wrong_training_options_leave_nothing_behind(text, tmp_path, capsys):
    out = tmp_path / "none"
    start = ["train", "--corpus", text, "--out", out, "--steps", "2", "--device", "cpu"]
    assert "not a multiple of --heads 5" in refused(capsys, *start, "--heads", "5")
    assert "--experts 1" in refused(capsys, *start, "--experts", "1")
    small = ["--vocab-size", "280"]
    assert "--minutes -1" in refused(capsys, *start[:5], *small, "--minutes", "-1")
    assert "steps=0" in refused(capsys, *start, *small, "--steps", "0")
    assert "lr=-1.0" in refused(capsys, *start, *small, "--lr", "-1")
    assert f"--out {text}: {text} is no folder" in refused(capsys, "train", "--corpus", text, "--out", text)
    assert "pyhton" in refused(capsys, "train", "--corpus", "pyhton", "--out", out)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà vu ".encode("latin-1") * 400)
    assert "UTF-8" in refused(capsys, "train", "--corpus", latin, "--out", out)
    assert not out.exists()


def test_recipe_is_handed_on_and_takes_no_other_setting(tmp_path, capsys, monkeypatch):
    from minimistral import recipes

    called = []
    monkeypatch.setattr(recipes, "train_recipe", lambda *given, **options: called.append((given, options)))
    start = ["train", "--recipe", "tales-moe", "--out", str(tmp_path)]
    assert cli.main([*start, "--minutes", "5"]) == 0
    expected = ("tales-moe", tmp_path, tmp_path / "training"), {"steps": None, "minutes": 5.0}
    assert called == [expected]
    assert "--kv-heads does not go with --recipe" in refused(capsys, *start, "--kv-heads", "2")
    assert "tales-dense, tales-moe" in refused(capsys, "train", "--recipe", "tale", "--out", tmp_path)
    (tmp_path / "params.json").touch()
    assert "holds a model" in refused(capsys, *start)


def test_generate_continues_the_prompt(trained, capsys):
    command = ["generate", "--model", str(trained), "--prompt", "il était", "--seed", "3",
               "--max-new-tokens", "12", "--device", "cpu"]
    assert cli.main(command) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("il était") and len(whole) > len("il était\n")
    assert cli.main([*command, "--stream"]) == 0
    assert capsys.readouterr().out == whole
    assert cli.main([*command, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert cli.main([*command, "--temperature", "2", "--top-k", "1"]) == 0
    assert capsys.readouterr().out == greedy


def test_wrong_generate_options(trained, tmp_path, capsys):
    model = ["generate", "--model", trained, "--device", "cpu"]
    assert "temperature" in refused(capsys, *model, "--temperature", "-1")
    assert "top_p" in refused(capsys, *model, "--top-p", "1.5")
    assert "max_new_tokens" in refused(capsys, *model, "--max-new-tokens", "-3")
    assert "no-such" in refused(capsys, "generate", "--model", "no-such")
    assert str(tmp_path) in refused(capsys, "generate", "--model", tmp_path)


def test_check_and_progress_reach_the_classroom(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINIMISTRAL_WORK", str(tmp_path))
    assert "minimistral lab" in refused(capsys, "check")
    assert "99" in refused(capsys, "check", "99")
    assert cli.main(["progress"]) == 0
    assert "Core pieces that are yours: 0 of" in capsys.readouterr().out


def test_interrupt_is_one_line(monkeypatch, capsys):
    def stop(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_generate", stop)
    assert cli.main(["generate"]) == 130
    assert capsys.readouterr().err.strip() == "minimistral: stopped"


def test_missing_extra_is_one_line_with_the_repair(monkeypatch, capsys):
    def need(arguments):
        raise ImportError("the tokenizer needs sentencepiece:\n  pip install sentencepiece")

    monkeypatch.setattr(cli, "_generate", need)
    assert "needs sentencepiece: pip install" in refused(capsys, "generate")


def test_help_lists_what_is_built_and_nothing_else():
    module = [sys.executable, "-m", "minimistral", "--help"]
    shown = subprocess.run(module, capture_output=True, text=True, check=True).stdout
    commands = re.findall(r"^    (\w+) +\w", shown, re.M)
    assert {"lab", "doctor", "train", "generate", "check", "grade", "progress"} <= set(commands)
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])


def test_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["trian"])
    assert "train" in capsys.readouterr().err


def test_a_server_says_in_one_line_why_it_does_not_start(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port}" in refused(capsys, "serve", "--no-compile", "--port", port)
    assert "port=99999" in refused(capsys, "serve", "--no-compile", "--port", 99999)
    assert "batch_size=0" in refused(capsys, "serve", "--no-compile", "--batch-size", 0)
    assert "threads=-1" in refused(capsys, "serve", "--no-compile", "--threads", -1)


def test_an_error_of_the_system_is_its_file_and_its_reason(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert refused(capsys, "slides", 0, tmp_path / "file") == f"minimistral: {tmp_path / 'file'}: File exists"


def test_a_pager_that_was_left_is_no_error():
    command = [sys.executable, "-c", "import sys; sys.stdin.read(); from minimistral import cli; sys.exit(cli.main(['glossary']))"]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.stdout.close()
    started.stdin.close()
    assert (started.stderr.read(), started.wait()) == (b"", 0)
