"""Measuring: how pictures are drawn, what suites read from them, with which intervals; and speed."""
