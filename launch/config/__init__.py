"""Configuration: composed by Hydra, made into typed values, explained by ``--help``."""
