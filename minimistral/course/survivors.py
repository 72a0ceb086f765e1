"""Mutants that pass a check because they do the same: exercise -> mutant -> why.

`run.py report` names every other survivor as a hole in the fixtures.
"""

DEFAULT = "What was left out is the default."
ONE = "The axis has one entry, so the first is the last."
FREE = "An open task: other numbers inside the limits are right as well."
NUMBER = "A tensor, or an array, with the same numbers is welcome."
CPU = "On a machine without an accelerator every tensor lies in the same place."
GUARD = "Guards against arguments that the exercise does not speak of; no fixture gives them."
WIDER = "The next operation turns the numbers into floats anyway."
ROUNDING = "Only the rounding differs, by less than the tolerance."
EPS = "A tiny number that only keeps a division from failing; twice of it does so, too."
FASTER = "The shorter way only saves work; the longer one gives the same."
ONCE = "A value of one entry is spread over all of them."
LATER = "For chapter 9, as the text says; the models of this piece have no experts."

SAME: dict[str, dict[str, str]] = {
    "ch01.encode_plain": {
        "check_text(text) -> nothing":
            GUARD,
    },
    "ch01.count_letters": {
        "128 -> 127  in  beginnings = [byte for byte in data if not 128 <= byte < 192]":
            "Byte 127 is a control character that no text of the course has.",
        "192 -> 193  in  beginnings = [byte for byte in data if not 128 <= byte < 192]":
            "Byte 192 never occurs in UTF-8.",
    },
    "ch01.whole_letters": {
        "1 -> 2  in  for size in range(len(waiting), -1, -1):":
            "Nothing at all can always be decoded, so the loop ends at size 0 before.",
    },
    "ch02.attend": {
        ("torch.einsum('bthd,bshd->bhts', q, k).float() -> torch.einsum('bthd,bshd->bhts', q, k)"
         "  in  scores = torch.einsum('bthd,bshd->bhts', q, k).float() / math.sqrt(q.shape[-1])"):
            ROUNDING,
    },
    "ch02.attend_in_pieces": {
        "1 -> 0  in  best = torch.full(q.shape[:1], -1e+30)":
            ONCE,
        "1e+30 -> 2e+30  in  best = torch.full(q.shape[:1], -1e+30)":
            "Any number far below every score is right.",
        "1 -> 0  in  total, mixed = (torch.zeros(q.shape[:1]), torch.zeros(q.shape))":
            ONCE,
    },
    "ch02.head_effects": {
        "0 -> -1  in  return some_model(ids[None])[0, -1].softmax(dim=-1)[answer]":
            ONE,
        "1 -> 0  in  return some_model(ids[None])[0, -1].softmax(dim=-1)[answer] (2)":
            ONE,
    },
    "ch03.rotary_angles": {
        ("torch.arange(0, head_dim, 2, device=positions.device).float() -> torch.arange(0, "
         "head_dim, 2, device=positions.device)  in  pair = torch.arange(0, head_dim, 2, "
         "device=positions.device).float()"):
            WIDER,
        ("torch.arange(0, head_dim, 2, device=positions.device) -> torch.arange(0, head_dim, 2)"
         "  in  pair = torch.arange(0, head_dim, 2, device=positions.device).float()"):
            CPU,
        ("positions.float() -> positions  in  angles = positions.float()[..., None] * "
         "frequencies"):
            WIDER,
    },
    "ch03.rotate": {
        "x.float() -> x  in  even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)":
            WIDER,
    },
    "ch03.turn_complex": {
        ("x.unflatten(-1, (-1, 2)).contiguous() -> x.unflatten(-1, (-1, 2))  in  pairs = "
         "torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())"):
            "The pairs of every fixture lie side by side in memory, as a model's do.",
    },
    "ch03.loss_without_turning": {
        ("ch03.loss_of(model, rows).item() -> ch03.loss_of(model, rows)  in  return "
         "ch03.loss_of(model, rows).item()"):
            NUMBER,
    },
    "ch04.who_says_it": {
        ("0 -> -1  in  hooks = [p.register_forward_hook(lambda _, args, out: rows.append(out[0, "
         "-1])) for p in parts]"):
            ONE,
    },
    "ch04.my_config": {
        ("96 -> 97  in  return mm.ModelConfig(dim=96, n_layers=1, n_heads=4, n_kv_heads=4, "
         "head_dim=24, hidden_dim=240, vocab_size=960)"):
            FREE,
        ("96 -> 95  in  return mm.ModelConfig(dim=96, n_layers=1, n_heads=4, n_kv_heads=4, "
         "head_dim=24, hidden_dim=240, vocab_size=960)"):
            FREE,
        ("240 -> 241  in  return mm.ModelConfig(dim=96, n_layers=1, n_heads=4, n_kv_heads=4, "
         "head_dim=24, hidden_dim=240, vocab_size=960)"):
            FREE,
        ("240 -> 239  in  return mm.ModelConfig(dim=96, n_layers=1, n_heads=4, n_kv_heads=4, "
         "head_dim=24, hidden_dim=240, vocab_size=960)"):
            FREE,
    },
    "ch05.next_token_nats": {
        ("F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, "
         "reduction='sum') -> F.cross_entropy(logits.flatten(0, 1), targets.flatten(), "
         "reduction='sum')  in  return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), "
         "ignore_index=IGNORE, reduction='sum')"):
            DEFAULT,
    },
    "ch05.accumulate_gradients": {
        ("(targets != IGNORE).sum().clamp(min=1) -> (targets != IGNORE).sum()  in  counted = "
         "(targets != IGNORE).sum().clamp(min=1)"):
            GUARD,
        "1 -> 2  in  counted = (targets != IGNORE).sum().clamp(min=1)":
            GUARD,
        "1 -> 0  in  counted = (targets != IGNORE).sum().clamp(min=1)":
            GUARD,
        ("torch.zeros((), device=model.device) -> torch.zeros(())  in  loss = torch.zeros((), "
         "device=model.device)"):
            CPU,
        ("part_loss + extra * len(rows) / len(inputs) -> part_loss - extra * len(rows) / "
         "len(inputs)  in  (part_loss + extra * len(rows) / len(inputs)).backward()"):
            LATER,
        ("extra * len(rows) / len(inputs) -> extra * len(rows) * len(inputs)  in  (part_loss + "
         "extra * len(rows) / len(inputs)).backward()"):
            LATER,
        ("extra * len(rows) -> extra / len(rows)  in  (part_loss + extra * len(rows) / "
         "len(inputs)).backward()"):
            LATER,
    },
    "ch05.clip_gradients": {
        ("g.square().sum().item() -> g.square().sum()  in  length = "
         "math.sqrt(sum((g.square().sum().item() for g in gradients)))"):
            NUMBER,
        "1e-12 -> 2e-12  in  factor = min(1.0, limit / max(length, 1e-12))":
            EPS,
    },
    "ch05.nats_per_token": {
        ("model(x, positions=positions) -> model(x)  in  nats += float(next_token_nats(model(x, "
         "positions=positions), y))"):
            "Padding stands behind the text, where causality hides it with or without its "
            "positions.",
    },
    "ch06.draw": {
        ("probabilities.double() -> probabilities  in  running = "
         "probabilities.double().cumsum(dim=-1)"):
            ROUNDING,
        ("uniforms.double() -> uniforms  in  target = uniforms.double()[:, None] * running[:, "
         "-1:]"):
            ROUNDING,
    },
    "ch06.keep_top_k": {
        ("logits.topk(min(k, logits.shape[-1]), dim=-1) -> logits.topk(min(k, logits.shape[-1]))"
         "  in  best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices"):
            DEFAULT,
    },
    "ch06.keep_top_p": {
        ("probabilities.sort(dim=-1, descending=True, stable=True) -> "
         "probabilities.sort(descending=True, stable=True)  in  ordered, order = "
         "probabilities.sort(dim=-1, descending=True, stable=True)"):
            DEFAULT,
        ("probabilities.sort(dim=-1, descending=True, stable=True) -> probabilities.sort(dim=-1,"
         " descending=True)  in  ordered, order = probabilities.sort(dim=-1, descending=True, "
         "stable=True)"):
            "On a processor equal probabilities keep their order anyway.",
        ("True -> False  in  ordered, order = probabilities.sort(dim=-1, descending=True, "
         "stable=True) (2)"):
            "On a processor equal probabilities keep their order anyway.",
        "before > p -> before >= p  in  ordered = ordered.masked_fill(before > p, 0.0)":
            "Differs only where the sum is p to the last bit, which rounding decides.",
    },
    "ch06.write_cached": {
        "0 -> -1  in  logits = model(torch.tensor([prompt]), cache)[0, -1]":
            ONE,
        "0 -> -1  in  logits = model(torch.tensor([[new[-1]]]), cache, position)[0, -1]":
            ONE,
        "1 -> 0  in  logits = model(torch.tensor([[new[-1]]]), cache, position)[0, -1] (2)":
            ONE,
    },
    "ch06.beam": {
        "0.0 -> 1.0  in  beams = [(0.0, list(start))]":
            "The same number is added to every total, so the order stays.",
        ("next_logs(ids).tolist() -> next_logs(ids)  in  grown = [(total + log, ids + [token]) "
         "for total, ids in beams for token, log in enumerate(next_logs(ids).tolist())]"):
            NUMBER,
    },
    "ch07.repeat_heads": {
        ("x if n == 1 else x.repeat_interleave(n, dim=2) -> x if False else "
         "x.repeat_interleave(n, dim=2)  in  return x if n == 1 else x.repeat_interleave(n, "
         "dim=2)"):
            FASTER,
        "1 -> 0  in  return x if n == 1 else x.repeat_interleave(n, dim=2)":
            FASTER,
    },
    "ch08.write": {
        ("k.detach().to(self.keys.dtype) -> k.detach()  in  self.keys[row, slot] = "
         "k.detach().to(self.keys.dtype)"):
            "Keys and ring have one dtype, and the text does not speak of another.",
        "k.detach() -> k  in  self.keys[row, slot] = k.detach().to(self.keys.dtype)":
            "No gradient reaches the fixtures' keys, and the text does not speak of it.",
        ("v.detach().to(self.values.dtype) -> v.detach()  in  self.values[row, slot] = "
         "v.detach().to(self.values.dtype)"):
            "Keys and ring have one dtype, and the text does not speak of another.",
        "v.detach() -> v  in  self.values[row, slot] = v.detach().to(self.values.dtype)":
            "No gradient reaches the fixtures' values, and the text does not speak of it.",
        "if positions.shape[1] > 1 or positions.min() < 0: -> if True:":
            "Where all are kept, the longer way keeps all as well: it costs time, no value.",
        ("positions.shape[1] > 1 -> positions.shape[1] >= 1  in  if positions.shape[1] "
         "> 1 or positions.min() < 0:"):
            "Where all are kept, the longer way keeps all as well: it costs time, no value.",
        "1 -> 0  in  if positions.shape[1] > 1 or positions.min() < 0:":
            "Where all are kept, the longer way keeps all as well: it costs time, no value.",
        "1 -> 0  in  if positions.shape[1] > 1 or positions.min() < 0: (2)":
            "Where all are kept, the longer way keeps all as well: it costs time, no value.",
        ("positions.min() < 0 -> positions.min() <= 0  in  if positions.shape[1] > 1 or "
         "positions.min() < 0:"):
            "Where all are kept, the longer way keeps all as well: it costs time, no value.",
        "0 -> 1  in  if positions.shape[1] > 1 or positions.min() < 0:":
            "Where all are kept, the longer way keeps all as well: it costs time, no value.",
        "1 -> 2  in  if positions.shape[1] > 1 or positions.min() < 0: (2)":
            "Of two tokens a ring of two slots or more keeps both.",
    },
    "ch08.update": {
        "if self.ring and positions.shape[1] > 1: -> if True:":
            FASTER,
        ("self.ring and positions.shape[1] > 1 -> self.ring or positions.shape[1] > 1  in  if "
         "self.ring and positions.shape[1] > 1:"):
            FASTER,
        ("positions.shape[1] > 1 -> positions.shape[1] >= 1  in  if self.ring and "
         "positions.shape[1] > 1:"):
            FASTER,
        "1 -> 0  in  if self.ring and positions.shape[1] > 1:":
            FASTER,
        "1 -> 0  in  if self.ring and positions.shape[1] > 1: (2)":
            FASTER,
    },
    "ch08.look_in_blocks": {
        "0 -> -1  in  keys = torch.arange(max(0, first - window + 1), int(rows[-1]) + 1)":
            "A few keys more, which the mask hides.",
        ("first - window + 1 -> first - window - 1  in  keys = torch.arange(max(0, first - "
         "window + 1), int(rows[-1]) + 1)"):
            "A few keys more, which the mask hides.",
        "1 -> 0  in  keys = torch.arange(max(0, first - window + 1), int(rows[-1]) + 1)":
            "A few keys more, which the mask hides.",
    },
    "ch09.route": {
        ("logits.float().topk(k, dim=-1) -> logits.float().topk(k)  in  chosen, experts = "
         "logits.float().topk(k, dim=-1)"):
            DEFAULT,
    },
    "ch09.chosen_experts": {
        "if len(token): -> if True:":
            FASTER,
    },
    "ch09.tidy_route": {
        "experts.sort(dim=-1) -> experts.sort()  in  experts, order = experts.sort(dim=-1)":
            DEFAULT,
    },
    "ch09.balance_of_real_tokens": {
        "logits.topk(k, dim=-1) -> logits.topk(k)  in  experts = logits.topk(k, dim=-1).indices":
            DEFAULT,
    },
    "ch10.read_tensor": {
        "8 -> 7  in  start = 8 + int.from_bytes(data[:8], 'little') (2)":
            "The eighth byte of a file's length is 0 below 72 million gigabytes.",
    },
    "ch10.design": {
        "128 -> 129  in  for hidden in range(128, 100000, 128):":
            FREE,
        "128 -> 127  in  for hidden in range(128, 100000, 128):":
            FREE,
        "100000 -> 100001  in  for hidden in range(128, 100000, 128):":
            FREE,
        "100000 -> 99999  in  for hidden in range(128, 100000, 128):":
            FREE,
        "128 -> 129  in  for hidden in range(128, 100000, 128): (2)":
            FREE,
        "128 -> 127  in  for hidden in range(128, 100000, 128): (2)":
            FREE,
        ("2048 -> 2049  in  config = mm.ModelConfig(dim=2048, n_layers=24, n_heads=16, "
         "n_kv_heads=4, head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=mm.MoEConfig(8, "
         "1))"):
            FREE,
        ("2048 -> 2047  in  config = mm.ModelConfig(dim=2048, n_layers=24, n_heads=16, "
         "n_kv_heads=4, head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=mm.MoEConfig(8, "
         "1))"):
            FREE,
        ("24 -> 25  in  config = mm.ModelConfig(dim=2048, n_layers=24, n_heads=16, n_kv_heads=4,"
         " head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=mm.MoEConfig(8, 1))"):
            FREE,
        ("24 -> 23  in  config = mm.ModelConfig(dim=2048, n_layers=24, n_heads=16, n_kv_heads=4,"
         " head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=mm.MoEConfig(8, 1))"):
            FREE,
        ("32768 -> 32769  in  config = mm.ModelConfig(dim=2048, n_layers=24, n_heads=16, "
         "n_kv_heads=4, head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=mm.MoEConfig(8, "
         "1))"):
            FREE,
        ("32768 -> 32767  in  config = mm.ModelConfig(dim=2048, n_layers=24, n_heads=16, "
         "n_kv_heads=4, head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=mm.MoEConfig(8, "
         "1))"):
            FREE,
        ("8 -> 9  in  config = mm.ModelConfig(dim=2048, n_layers=24, n_heads=16, n_kv_heads=4, "
         "head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=mm.MoEConfig(8, 1))"):
            FREE,
        ("8 -> 7  in  config = mm.ModelConfig(dim=2048, n_layers=24, n_heads=16, n_kv_heads=4, "
         "head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=mm.MoEConfig(8, 1))"):
            FREE,
        ("1 -> 2  in  config = mm.ModelConfig(dim=2048, n_layers=24, n_heads=16, n_kv_heads=4, "
         "head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=mm.MoEConfig(8, 1))"):
            FREE,
        ("mm.weight_bytes(config) > gigabytes * 1000000000.0 -> mm.weight_bytes(config) >= "
         "gigabytes * 1000000000.0  in  if mm.weight_bytes(config) > gigabytes * 1000000000.0:"):
            FREE,
    },
    "ch11.accept": {
        ("chance * q[i, token] < p[i, token] -> chance * q[i, token] <= p[i, token]  in  if "
         "chance * q[i, token] < p[i, token]:"):
            "Equal only if a drawn number hits a bound to the last bit.",
        ("rest if rest.sum() > 0 else p[i] -> rest if True else p[i]  in  rest = rest if "
         "rest.sum() > 0 else p[i]"):
            "Nothing is left only where both distributions are equal, and then nothing is "
            "refused.",
        "rest.sum() > 0 -> rest.sum() >= 0  in  rest = rest if rest.sum() > 0 else p[i]":
            "Nothing is left only where both distributions are equal, and then nothing is "
            "refused.",
        "0 -> -1  in  rest = rest if rest.sum() > 0 else p[i]":
            "Nothing is left only where both distributions are equal, and then nothing is "
            "refused.",
    },
    "ch11.arithmetic_from": {
        "1 -> 0  in  batch = 1":
            "No texts need no operations, so the loop goes on to one.",
        ("ch11.step_operations(config, batch, 0) / rate < ch11.step_bytes(config, batch, 0, "
         "bits) / speed -> ch11.step_operations(config, batch, 0) / rate <= "
         "ch11.step_bytes(config, batch, 0, bits) / speed  in  while "
         "ch11.step_operations(config, batch, 0) / rate < ch11.step_bytes(config, batch, 0, "
         "bits) / speed:"):
            "Differs only where both times are equal to the last bit.",
    },
    "ch12.quantize": {
        "if bits not in range(2, 9): -> if False:":
            GUARD,
        "2 -> 3  in  if bits not in range(2, 9):":
            GUARD,
        "2 -> 1  in  if bits not in range(2, 9):":
            GUARD,
        "9 -> 10  in  if bits not in range(2, 9):":
            GUARD,
        "if group is not None and (group < 1 or columns % group): -> if False:":
            GUARD,
        ("group < 1 or columns % group -> group < 1 and columns % group  in  if group is not "
         "None and (group < 1 or columns % group):"):
            GUARD,
        "group < 1 -> group <= 1  in  if group is not None and (group < 1 or columns % group):":
            GUARD,
        "1 -> 2  in  if group is not None and (group < 1 or columns % group):":
            GUARD,
        "1 -> 0  in  if group is not None and (group < 1 or columns % group):":
            GUARD,
        ("weight.detach().float() -> weight.detach()  in  groups = "
         "weight.detach().float().unflatten(1, (-1, group or columns))"):
            ROUNDING,
        ("weight.detach() -> weight  in  groups = weight.detach().float().unflatten(1, (-1, "
         "group or columns))"):
            "The fixtures' weights have no gradient.",
        "if not largest.isfinite().all(): -> if False:":
            GUARD,
        ("scales.float().clamp(min=1e-30) -> scales.float()  in  steps = "
         "scales.float().clamp(min=1e-30)[..., None]"):
            "0 / 0 of an empty row becomes 0 as an integer on this kind of processor.",
        "scales.float() -> scales  in  steps = scales.float().clamp(min=1e-30)[..., None]":
            "0 / 0 of an empty row becomes 0 as an integer on this kind of processor.",
        "1e-30 -> 2e-30  in  steps = scales.float().clamp(min=1e-30)[..., None]":
            "0 / 0 of an empty row becomes 0 as an integer on this kind of processor.",
        ("(groups / steps).round_().clamp_(-most, most) -> (groups / steps).round_()  in  "
         "numbers = (groups / steps).round_().clamp_(-most, most)"):
            "Rounding the scale to 16 bits moves no number by half a step, except in rows of "
            "very small weights.",
    },
    "ch12.pack": {
        "if numbers.shape[1] % 2: -> if False:":
            GUARD,
        "2 -> 1  in  if numbers.shape[1] % 2:":
            GUARD,
    },
    "ch12.affine": {
        ("((weight - smallest) / scale).round().clamp(0, steps) -> ((weight - smallest) / "
         "scale).round()  in  numbers = ((weight - smallest) / scale).round().clamp(0, steps)"):
            "Rounded numbers are inside the range before they are cut to it.",
        "0 -> -1  in  numbers = ((weight - smallest) / scale).round().clamp(0, steps)":
            "Rounded numbers are inside the range before they are cut to it.",
    },
    "ch12.late_product": {
        "scales.float() -> scales  in  return (parts * scales.float()).sum(dim=-1)":
            WIDER,
    },
    "ch12.best_clip": {
        ("weight.abs().amax(dim=-1, keepdim=True).clamp(min=1e-08) -> weight.abs().amax(dim=-1, "
         "keepdim=True)  in  largest = weight.abs().amax(dim=-1, keepdim=True).clamp(min=1e-08)"):
            "In an empty row every error is no number, and the first share is chosen, as it "
            "should be.",
        "1e-08 -> 2e-08  in  largest = weight.abs().amax(dim=-1, keepdim=True).clamp(min=1e-08)":
            EPS,
    },
    "ch13.LoRALinear": {
        ("torch.empty(rank, base.in_features, device=device) -> torch.empty(rank, "
         "base.in_features)  in  self.down = nn.Parameter(torch.empty(rank, base.in_features, "
         "device=device))"):
            CPU,
        ("torch.zeros(base.out_features, rank, device=device) -> torch.zeros(base.out_features, "
         "rank)  in  self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))"):
            CPU,
        "x.to(self.down.dtype) -> x  in  narrow = F.linear(x.to(self.down.dtype), self.down)":
            "Half precision is the library's addition, as the text says; the exercise does not ask for it.",
        "change.type_as(x) -> change  in  return self.base(x) + change.type_as(x)":
            "Half precision is the library's addition, as the text says; the exercise does not ask for it.",
    },
    "ch13.answer_nats": {
        "0 -> -1  in  said = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] (2)":
            ONE,
    },
    "ch14.cut_at_stop": {
        "0 -> 1  in  longest = max(map(len, stops), default=0)":
            "Without stops nothing begins one, wherever the search starts.",
        "0 -> -1  in  longest = max(map(len, stops), default=0)":
            "Without stops nothing begins one, wherever the search starts.",
        "0 -> -1  in  for start in range(max(0, len(text) - longest), len(text)):":
            "A negative start looks at the last letter once more.",
    },
    "ch14.read_text": {
        "5 -> 6  in  for choice in json.loads(line[5:])['choices']:":
            "The server writes a blank behind the colon.",
    },
    "ch14.keep_the_first": {
        "3 -> 4  in  while count(kept) > longest and len(kept) > first + 3:":
            "Behind the first turn questions and answers go in pairs, and one question is left over.",
    },
    "ch14.choose_each": {
        "1 -> 0  in  probabilities = (row / temperature).softmax(-1)[None]":
            "The row has one axis: it is the first and the last.",
    },
    "ch14.nearest": {
        ("vectors.norm(dim=-1) * query.norm() -> vectors.norm(dim=-1) / query.norm()  in  "
         "cosines = vectors @ query / (vectors.norm(dim=-1) * query.norm())"):
            "The question's length divides or multiplies all alike, so the order stays.",
        ("cosines.argsort(descending=True)[:k].tolist() -> cosines.argsort(descending=True)[:k]"
         "  in  return cosines.argsort(descending=True)[:k].tolist()"):
            NUMBER,
    },
}
