"""Property tests with generated, hostile input: a package, so that its files can be named after the rooms, too."""
