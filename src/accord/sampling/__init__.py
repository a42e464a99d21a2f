"""Prompts to completions: token ids, log-probabilities of the sampling distribution and of the model, stop reasons."""
