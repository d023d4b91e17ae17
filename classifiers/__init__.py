"""Classifiers that decide whether a text touches a forget target."""
