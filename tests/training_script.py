"""A small training run as a process of its own: `training_script.py folder [settings as JSON]`.

With a folder it keeps checkpoints there; at the end it prints its losses and a hash of the
weights. tests/test_resume.py kills it, tests/test_distributed.py runs it twice at once.
"""

import hashlib
import json
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
    folder = sys.argv[1] if sys.argv[1] != "-" else None
    settings = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    model = new_model(settings.pop("experts", False))
    config = TrainConfig(**{"steps": 14, "batch_size": 7, "seq_len": 16, "warmup_steps": 5,
                            "save_every": 2, "folder": folder} | settings)
    record = train(model, join_documents(DOCUMENTS), config, progress=False)
    print(json.dumps({"losses": record.losses, "weights": weights_hash(model)}), flush=True)


if __name__ == "__main__":
    main()
