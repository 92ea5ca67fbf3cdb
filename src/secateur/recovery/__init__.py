"""Recovery: training a pruned model back without losing its zeros."""
