"""Validation questions: scores and reports."""
