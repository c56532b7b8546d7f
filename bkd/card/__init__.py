"""The model card: what a student is, written from its run for those who find it on the Hub.

It lies in the run folder, beside the student, which training may replace; `bkd push` brings the two together.
"""
