"""A prediction job: what a finished run's model says of the examples in a file, as a CSV file.

Guarantee: it reads the run's folder and the new examples, nothing else. Neither the private data nor the
configuration is needed; the weights are checked against the digest in the folder's model.json.

    python predict_csv.py RUN examples.npy said.csv
"""

import csv
import sys

import fedsim


def main(folder, examples, out):
    said = fedsim.load_run(folder).predict(examples)
    with open(out, "w", encoding="utf-8", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["input", "class", "probability"])
        for name, best, probabilities in zip(said.examples, said.best, said.outputs, strict=True):
            table.writerow([name, said.names[best] if said.names else best, f"{probabilities[best]:.4f}"])


if __name__ == "__main__":
    main(*sys.argv[1:])
