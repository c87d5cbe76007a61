"""Servers, runs and small networks that several tests use."""
