"""Adapt a transformer to classify texts: low-rank adapters and the classifier are all that is trained.

This one is small and drawn at random; {"path": "/a/folder"} in place of "architecture" and "config" starts
from a published one, with the tokenizer.json beside its weights as the tokenizer of the data.
Needs data.py beside it.
"""

import data

import fedsim

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
HOLDERS = {"holders": 30, "nodes": 2, "partition": "iid"}


def main(out="runs/text_lora", federation=HOLDERS):
    options = {"target": "opinion", "classes": ["bad", "good"], "vocabulary": 512, "places": 12}
    texts = {"name": "text", "root": data.reviews(), "options": options}
    bert = {"name": "transformers", "options": {"architecture": "bert", "config": TINY, "lora": {"r": 4}}}
    privacy, train = {"target_epsilon": 8.0, "delta": 1e-4}, {"steps": 100, "expected_batch_size": 300}
    rest = {"optimizer": {"name": "adam", "learning_rate": 0.02}, "privacy": privacy, "train": train}
    return fedsim.train(data=texts, model=bert, federation=federation, out=out, **rest)


if __name__ == "__main__":
    print(main())
