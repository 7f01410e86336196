"""What the server answers, grouped as a user thinks of it. Importing the package fills the table of routes."""

from . import cas, discussions, files, lfs, refs, repos, upload

__all__ = ["cas", "discussions", "files", "lfs", "refs", "repos", "upload"]
