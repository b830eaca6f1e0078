"""Packaging for tools that look for this file; pyproject.toml declares everything."""

from setuptools import setup

setup()
