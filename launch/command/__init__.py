"""Commands: the words of one command line become a verb's run, its help, or an error."""
