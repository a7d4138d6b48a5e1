"""A metric that is no mean over examples: the recall of every class, and their mean.

Guarantee: it is taken of released parameters on the evaluation split. fedsim writes it as public where that
split is public test data and as sensitive where it was held out of the training examples
(`data.holdout_examples`); you do not choose, and cannot get it wrong. A class without examples does not
count.
Source: also called balanced accuracy; Brodersen et al. 2010, "The Balanced Accuracy and Its Posterior
Distribution".
"""

import torch

import fedsim


@fedsim.metric(unit="%", name="macro_recall")
class MacroRecall:
    """Recall of each class that the split has, averaged: rare classes count as much as frequent ones."""

    def __init__(self):
        self.right, self.all = torch.zeros(0), torch.zeros(0)

    def add(self, outputs, targets):
        """Take in a batch: logits (n, classes) and classes (n,)."""
        right = targets[outputs.argmax(1) == targets]
        found, every = (torch.bincount(labels, minlength=outputs.shape[1]) for labels in (right, targets))
        self.right, self.all = (found, every) if not len(self.all) else (self.right + found, self.all + every)

    def result(self):
        """The number, once everything was taken in."""
        present = self.all > 0
        return float((self.right[present] / self.all[present].double()).mean())
