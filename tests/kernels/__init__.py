"""Tests of speeder_kernels and of its build."""
