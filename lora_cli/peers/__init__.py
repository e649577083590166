"""Configs of other programs, one file for each, and the keys of transformers' Trainer that they share."""
