"""Small training runs as a process of their own: `training_script.py [settings, ...]`, as JSON.

For each settings it prints its number, its losses and a hash of the trained weights.
tests/test_resume.py kills it, tests/test_distributed.py runs two of it at once.
"""

import hashlib
import json
import os
import sys

import torch

from minimistral.config import ModelConfig, MoEConfig
from minimistral.model import Transformer
from minimistral.train import TrainConfig, join_documents, train

DOCUMENTS = [[1, *(20 + (3 * i + j * (1 + i % 4)) % 28 for j in range(3 + 5 * i % 17)), 2]
             for i in range(60)]


def new_model(experts: bool = False) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(
        dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=40, vocab_size=50,
        moe=MoEConfig(5, 2) if experts else None))


def weights_hash(model: Transformer) -> str:
    digest = hashlib.sha256()
    for weight in model.parameters():
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    for number, settings in enumerate(json.loads(sys.argv[1])):
        model = new_model(settings.pop("experts", False))
        config = TrainConfig(**{"steps": 14, "batch_size": 7, "seq_len": 16, "warmup_steps": 5,
                                "save_every": 2} | settings)
        record = train(model, join_documents(DOCUMENTS), config, progress=False)
        line = json.dumps({"number": number, "losses": record.losses,
                           "weights": weights_hash(model)}) + "\n"
        os.write(1, line.encode())             # in one piece: two processes share a pipe


if __name__ == "__main__":
    main()
