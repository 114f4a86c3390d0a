"""A study file that is sound, and how a test changes it."""

GOOD = {
    "name": "tiny",
    "domains": [{"name": "code", "inputs": ["code/*.jsonl"]}, {"name": "math", "inputs": ["math/*.jsonl"], "max_epochs": 2}],
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
    "train": {"seq_length": 128, "global_batch_size": 8, "lr": 0.001},
    "base": {"tokens": "4M"},
    "component": {"tokens": "2M", "lr": 3e-4, "anchor": {"mixture": {"code": 0.25, "math": 0.75}, "share": 0.5}},
    "search": {"rounds": [8, 4], "objective": {"code": 2, "math": 1}},
    "final": {"tokens": "1e7"},
}


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(data):
        for part in path:
            data = data[part] if isinstance(part, int) else data.setdefault(part, {})
        data[last] = value

    return change
