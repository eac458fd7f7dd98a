"""Audits of training sets: what is broken, mislabeled, poisoned or harmful, and how sure that is."""
