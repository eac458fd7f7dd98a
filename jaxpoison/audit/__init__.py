"""Audits of training sets: what is mislabeled, poisoned, harmful or broken, and how sure."""
