"""Tests of Secateur; ``tests.cases`` is the table of small networks, ``tests.oracle`` the independent oracle."""
