"""Poisons and filters in transfer learning (arXiv 2403.13523)."""
