"""The version, apart from what loads the library, so that a build can read it."""

VERSION = "0.1.0"
