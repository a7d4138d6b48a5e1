"""Privacy: what a step released (events), what that costs (accountant), what a target allows (search), and
the record of it (ledger)."""
