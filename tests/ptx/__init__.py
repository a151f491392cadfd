"""A machine that executes PTX on the CPU, checks it while it runs and counts what it does. See README.md beside this file."""

from .machine import Finding, Kernel, Memory, Module, Report, Traffic, launch
from .program import UnknownInstruction

__all__ = ["Finding", "Kernel", "Memory", "Module", "Report", "Traffic", "UnknownInstruction", "launch"]
