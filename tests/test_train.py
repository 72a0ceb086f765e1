"""Training: the order of the data, the loss, the optimiser, the schedule, the loop."""

import ctypes
import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from minimistral import attention, recipes
from minimistral.attention import may_attend, plain_attend
from minimistral.config import ModelConfig, MoEConfig
from minimistral.model import Transformer
from minimistral.moe import balance_loss, record_routing
from minimistral.tokenizer import Tokenizer
from minimistral.train import (IGNORE, TrainConfig, Tokens, accumulate_gradients,
                               encode_documents, evaluate, join_documents, learning_rate,
                               make_optimizers, next_token_nats, parameter_groups, train,
                               training_batch, validation_rows)
from minimistral.train_run import kept_memory, masked_matmul

CONFIG = ModelConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=40,
                     vocab_size=50)
MIXTURE = replace(CONFIG, moe=MoEConfig(5, 2), sliding_window=7)
DOCUMENTS = [[1, *(20 + (3 * i + j * (1 + i % 4)) % 28 for j in range(3 + 5 * i % 17)), 2]
             for i in range(60)]
TOKENS = join_documents(DOCUMENTS)
QUICK = TrainConfig(steps=4, batch_size=6, seq_len=16, warmup_steps=2)


def new_model(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return Transformer(config)


# ------------------------------------------------------------------------- the data


def test_documents_lie_end_to_end_and_their_starts_are_known():
    tokenizer = Tokenizer.train(["the cat and the hat"] * 9, 280)
    tokens = encode_documents(tokenizer, ["the cat", "", "die Tür"])
    pieces = torch.tensor_split(tokens.ids, tokens.starts[1:])
    assert [tokenizer.decode(p.tolist()) for p in pieces] == ["the cat", "", "die Tür"]
    assert all(p[0] == tokenizer.bos_id and p[-1] == tokenizer.eos_id for p in pieces)


def test_targets_are_the_next_tokens_and_starts_are_not_counted():
    inputs, targets = training_batch(TOKENS, 3, QUICK)
    assert inputs.shape == targets.shape == (6, 16)
    known = targets[:, :-1] != IGNORE
    assert (inputs[:, 1:] == targets[:, :-1])[known].all()
    assert (inputs[:, 1:][~known] == 1).all() and (~known).any()
    assert not (targets == 1).any()


def test_a_round_reads_every_token_once():
    length = 16 * 30
    tokens = Tokens(torch.arange(length), torch.zeros(0, dtype=torch.long))
    config = replace(QUICK, batch_size=6)
    read = [torch.cat([training_batch(tokens, step, config)[0].flatten()
                       for step in range(5 * turn, 5 * turn + 5)]) for turn in range(2)]
    for tokens_read in read:
        assert torch.equal(tokens_read.sort().values, torch.arange(length))
    assert not torch.equal(*read)
    assert set(read[0][::16].tolist()) != set(read[1][::16].tolist())     # cut elsewhere


@pytest.mark.parametrize("batch_size", [7, 60, 130])
def test_at_starts_each_document_begins_a_row_once_a_round(batch_size):
    config = replace(QUICK, batch_size=batch_size, at_starts=True)
    steps = math.lcm(60, batch_size) // batch_size
    rows = torch.cat([training_batch(TOKENS, step, config)[0] for step in range(steps)])
    assert (rows[:, 0] == 1).all()
    firsts = sorted(tuple(row[:6].tolist()) for row in rows[:60])
    ring = TOKENS.ids.repeat(2)
    assert firsts == sorted(tuple(ring[s:s + 6].tolist()) for s in TOKENS.starts)


def test_a_text_shorter_than_a_row_goes_round():
    tokens = Tokens(torch.tensor([5, 6, 7]), torch.zeros(0, dtype=torch.long))
    inputs, targets = training_batch(tokens, 0, QUICK)
    assert (torch.where(inputs == 7, 5, inputs + 1) == targets).all()


def test_another_seed_reads_in_another_order():
    one, other = (training_batch(TOKENS, 0, replace(QUICK, seed=s))[0] for s in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("seq_len", [5, 19, 20, 64])
def test_validation_rows_predict_every_token_once_and_cut_only_what_is_too_long(seq_len):
    rows = validation_rows(DOCUMENTS, seq_len)
    assert rows.inputs.shape[1] == seq_len
    expected = [token for ids in DOCUMENTS for token in ids[1:]]
    assert rows.targets[rows.targets != IGNORE].tolist() == expected
    for inputs, targets, positions in zip(*rows):
        n = int((positions >= 0).sum())
        assert positions.tolist() == [*range(n)] + [-1] * (seq_len - n)
        assert (targets[n:] == IGNORE).all()
        inside = targets[:n - 1] != IGNORE
        assert (inputs[1:n] == targets[:n - 1])[inside].all()
    if seq_len >= max(map(len, DOCUMENTS)):
        assert (rows.inputs[:, 0] == 1).all()
    assert len(rows.inputs) < len(DOCUMENTS) or seq_len == 5


# ------------------------------------------------------------------------- the loss


def test_an_evaluation_is_the_sum_over_all_documents():
    model = new_model()
    rows = validation_rows(DOCUMENTS, max(map(len, DOCUMENTS)) - 1)
    nats = 0.0
    for inputs, targets, positions in zip(*rows):
        n = int((positions >= 0).sum())
        log_p = model(inputs[None, :n])[0].detach().double().log_softmax(-1)
        nats -= sum(float(log_p[i, t]) for i, t in enumerate(targets[:n]) if t != IGNORE)
    for batch_size in (1, 7, 500):
        found = evaluate(model, rows, batch_size)
        assert found.tokens == sum(len(ids) - 1 for ids in DOCUMENTS)
        assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.per_byte(100) == found.nats / 100


def gradients(model):
    return torch.cat([w.grad.flatten() for w in model.parameters()])


@pytest.mark.parametrize("accumulation, world", [(1, 2), (3, 1), (4, 1), (2, 3)])
def test_the_gradients_of_parts_and_processes_add_up_to_that_of_the_batch(accumulation, world):
    inputs, targets = training_batch(TOKENS, 0, replace(QUICK, batch_size=8))
    targets[:3, 2:] = IGNORE                    # parts with very different counts
    whole = new_model()
    loss = accumulate_gradients(whole, (inputs, targets), QUICK)
    parts = new_model()
    config = replace(QUICK, accumulation=accumulation)
    losses = [accumulate_gradients(parts, (inputs, targets), config, rank, world)
              for rank in range(world)]
    assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-7)

    trap = new_model()                          # the mean of means is something else
    for part in torch.arange(8).chunk(4):
        nats = next_token_nats(trap(inputs[part]), targets[part])
        (nats / (targets[part] != IGNORE).sum() / 4).backward()
    assert (gradients(trap) - gradients(whole)).norm() > 0.05 * gradients(whole).norm()


def test_the_balance_loss_evens_out_the_experts_and_is_not_in_the_reported_loss():
    def unevenness(balance):
        model = new_model(MIXTURE)
        with torch.no_grad():
            for layer in model.layers:          # a router that prefers experts 0 and 1
                layer.feed_forward.gate.weight.mul_(20)
        config = replace(QUICK, steps=40, batch_size=8, balance=balance, lr=5e-3)
        record = train(model, TOKENS, config, progress=False)
        with record_routing(model) as routing:
            model(training_batch(TOKENS, 0, config)[0])
        return balance_loss(routing, 2).item(), record.losses
    (without, plain), (with_it, balanced) = unevenness(0.0), unevenness(0.3)
    assert plain[0] == balanced[0]
    assert with_it < without - 0.05 and with_it < 2.1


# ------------------------------------------------------- the optimiser, the schedule


@pytest.mark.parametrize("config", [CONFIG, MIXTURE, replace(CONFIG, tied_embeddings=True)])
def test_only_matrices_decay_and_every_weight_has_one_group(config):
    model = new_model(config)
    decays, stays = parameter_groups(model, 0.1)
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.1, 0.0)
    names = {weight: name for name, weight in model.named_parameters()}
    assert sorted(map(id, decays["params"] + stays["params"])) == sorted(map(id, names))
    kept = {names[w] for w in stays["params"]}
    assert kept == {n for n in names.values() if "norm" in n or n == "tok_embeddings.weight"}


@pytest.mark.parametrize("config", [CONFIG, MIXTURE])
def test_muon_takes_the_matrices_inside_the_layers(config):
    model = new_model(config)
    muon, adamw = make_optimizers(model, replace(QUICK, optimizer="muon"))
    names = {id(weight): name for name, weight in model.named_parameters()}
    taken = [{names[id(w)] for g in o.param_groups for w in g["params"]} for o in (muon, adamw)]
    assert taken[0] == {n for n in names.values() if n.startswith("layers.") and "norm" not in n}
    assert taken[0] | taken[1] == set(names.values()) and not taken[0] & taken[1]


def test_the_learning_rate_rises_straight_and_falls_along_a_cosine():
    config = replace(QUICK, steps=101, warmup_steps=20, lr=2e-3, min_lr=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3)
    assert max(rates) == rates[20] == pytest.approx(2e-3)
    assert rates[60] == pytest.approx((2e-3 + 2e-4) / 2)
    assert rates[100] == pytest.approx(2e-4)
    assert all(a > b for a, b in zip(rates[20:], rates[21:]))
    assert learning_rate(0, replace(config, warmup_steps=0)) == 2e-3


# ------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("settings", [
    {}, {"optimizer": "muon"}, {"dtype": "bfloat16"}, {"at_starts": True, "accumulation": 3}])
def test_training_learns(settings):
    model = new_model()
    rows = validation_rows(DOCUMENTS, 32)
    config = replace(QUICK, steps=150, eval_every=60, lr=1e-2, **settings)
    record = train(model, TOKENS, config, val_rows=rows, progress=False)
    assert record.losses[0] == pytest.approx(math.log(50), abs=0.1)      # knows nothing yet
    assert [step for step, _ in record.evaluations] == [60, 120, 150]
    assert record.evaluations[-1][1] == pytest.approx(evaluate(model, rows).loss, rel=1e-5)
    assert record.evaluations[-1][1] < 1.2
    assert record.tokens == 150 * 6 * 16 and record.tokens_per_second > 0


def test_the_same_call_gives_the_same_weights_and_the_global_seed_is_left_alone():
    results = []
    for noise in (5, 6):
        model = new_model()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        train(model, TOKENS, QUICK, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    assert torch.equal(*results)


def test_a_record_is_written_as_json(tmp_path):
    record = train(new_model(), TOKENS, QUICK, progress=False, floor=0.5)
    record.to_json(tmp_path / "record.json")
    read = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert read["losses"] == record.losses and read["config"]["steps"] == 4
    assert read["floor"] == 0.5


def test_the_progress_line_shows_loss_floor_and_speed(capsys):
    train(new_model(), TOKENS, replace(QUICK, eval_every=2), floor=0.5,
          val_rows=validation_rows(DOCUMENTS, 32))
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("step 4/4", "loss 3.", "val 3.", "floor 0.5000", "tokens/s"):
        assert part in line


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move():
    model = new_model()
    with torch.no_grad():
        model.layers[1].attention.wo.weight[3, 2] = math.nan
    before = model.output.weight.clone()
    with pytest.raises(ValueError, match=r"nan at step 1 \(learning rate 1.50e-03\)"):
        train(model, TOKENS, QUICK, progress=False)
    assert torch.equal(model.output.weight, before)
    assert attention.fast_attend is not masked_matmul


def test_memory_is_kept_between_steps_and_given_back_after_them():
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("a matter of glibc")
    import resource

    def new_pages(size: int) -> int:
        """Pages that Linux hands out while a tensor is filled."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with kept_memory():
        new_pages(2**24)                                  # 64 MB
        assert new_pages(2**24 - 2**12) < 20
    assert new_pages(2**24 - 2**13) > 30                  # even where all have 2 MB


@pytest.mark.parametrize("settings, message", [
    ({"steps": 0}, "steps=0"), ({"lr": -1.0}, "lr=-1.0"), ({"lr": math.nan}, "lr=nan"),
    ({"min_lr": 3e-4 + 1}, "did you give a learning rate"),
    ({"accumulation": 7}, "cannot be cut"), ({"optimizer": "sgd"}, "one of"),
    ({"dtype": "float16"}, "one of"), ({"seq_len": 2.5}, "whole number")])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **settings)


@pytest.mark.parametrize("tokens, message", [
    (torch.tensor([3]), "1 tokens are too few"),
    (torch.rand(100), "whole numbers"), (torch.zeros(4, 5, dtype=torch.long), "whole numbers"),
    (torch.tensor([3, 50, 2]), "vocabulary of 50")])
def test_wrong_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        train(new_model(), tokens, QUICK, progress=False)


def test_at_starts_needs_starts():
    with pytest.raises(ValueError, match="encode_documents"):
        train(new_model(), TOKENS.ids, replace(QUICK, at_starts=True), progress=False)


@pytest.mark.parametrize("window", [None, 4])
def test_the_quick_attention_of_training_is_the_plain_one(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 11, heads, 8) for heads in (6, 2, 2))
    positions = torch.arange(11).repeat(3, 1)
    positions[1, 7:] = -1
    for places in (positions, positions[0]):
        mask = may_attend(places, places, window)
        torch.testing.assert_close(masked_matmul(q, k, v, mask), plain_attend(q, k, v, mask),
                                   rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                    reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["dense", "mixture"])
def test_compiled_training_is_training(config):
    small, losses = replace(config, n_layers=1), []
    for compiled in (False, True):
        model = new_model(small)
        record = train(model, TOKENS, replace(QUICK, compile=compiled), progress=False)
        losses.append(record.losses)
        assert "forward" not in vars(model.layers[0])                  # nothing left behind
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ------------------------------------------------------------------------- recipes


def test_framed_tales_leave_the_start_of_a_text_alone():
    corpus = recipes.load_corpus("tales", n_tales=300, val_tales=5)
    tokenizer = Tokenizer.train(corpus.train_documents, 400)
    documents = recipes.training_documents(tokenizer, corpus, 0.04)
    framed = [ids for ids in documents if ids[0] != tokenizer.bos_id]
    assert len(framed) == 12 and len(documents) == 300
    seen = set().union(*framed)
    for name in ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "</s>"):
        assert tokenizer.control_tokens[name] in seen
    assert all(tokenizer.bos_id not in ids for ids in framed)
    assert tokenizer.decode(framed[2]) == corpus.train_documents[74]


def test_a_recipe_trains_measures_and_records(tmp_path, monkeypatch):
    training = replace(QUICK, at_starts=True, compile=False)
    tiny = recipes.Recipe(
        replace(MIXTURE, vocab_size=330), training,
        replace(training, steps=3, warmup_steps=1, min_lr=0.0), n_tales=80, val_tales=10, tokenizer_tales=80, samples=3)
    monkeypatch.setitem(recipes.RECIPES, "tiny", tiny)
    precision = torch.get_float32_matmul_precision()
    facts = recipes.train_recipe("tiny", tmp_path / "out", tmp_path / "scratch", steps=5)
    assert torch.get_float32_matmul_precision() == precision
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "consolidated.safetensors", "params.json", "record.json", "tekken.json"]
    measured = facts["measured_on_stored_weights"]
    assert facts["steps"] == 5 + 3 and measured["parse"] == 0.0
    assert facts["evaluations"][-1][0] == 5 + 3
    assert measured["loss_over_floor"] == pytest.approx(
        measured["val_nats_per_byte"] / measured["floor_nats_per_byte"])
    again = recipes.train_recipe("tiny", tmp_path / "out", tmp_path / "scratch", steps=5)
    assert again["measured_on_stored_weights"] == measured          # resumed at its end
