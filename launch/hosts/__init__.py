"""Hosts: signs of life, deadlines and meeting points that the processes of all clusters share."""
