"""Backups: database and artifact store together, in one form for all kinds of both.

Owns that a backup is whole or not there, and that what it restores can be worked with. It holds
everything but the files of base models, which are found or fetched again: rows with the hashes of
API keys and the secrets of webhooks, so whoever can read it can read everything.
"""

from core.backup.layout import Manifest, Progress, verify
from core.backup.making import create_backup
from core.backup.restoring import Restored, restore_backup

__all__ = ["Manifest", "Progress", "Restored", "create_backup", "restore_backup", "verify"]
