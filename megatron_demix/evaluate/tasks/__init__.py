"""Task suites from local files: the public formats, questions made of their records, answers and how they are judged."""
