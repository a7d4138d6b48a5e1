"""Work on several runs, or on none: comparisons, repetitions, the dry run."""
