"""Removing parts of a UNet: their names, what a stock configuration can express, the plan from teacher to student."""
