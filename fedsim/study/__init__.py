"""Work on several runs, or on none.

compare, repeat     one recipe under variants and budgets, or with several seeds
tune, private_tune  searches for settings, not counted or counted in epsilon
space, whole, fixed what a search tries: ranges, whole numbers among them, and what it must not choose
scored, tuned       which trial is the best; the file of what was chosen
unlike, taken_up    what runs have other than the search, or than the command that takes them up
judged              the examples that models are judged by, and runs without a score
names, claimed      names that are told apart; whose a folder is
plan, probe         the dry run of a configuration; what an encoder has learned
"""
