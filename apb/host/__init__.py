"""Hosts: one model, one transport and the caches of one rank, and the messages that hosts are sent."""
