"""Where the card and what it shows lie: in the run's folder, in an exported student's, and in the repository."""

CARD_FILE = "README.md"
CARD_FOLDER = "card"
"""Pictures, measurements and the recipe that the card speaks of."""
REPO_PLACEHOLDER = "NAMESPACE/NAME"
"""Stands in the card's example for the repository, until `bkd push` knows it."""
DIGEST_KEY = "bkd_student_sha256"
"""In the card's head: of the weights that it was written for."""
