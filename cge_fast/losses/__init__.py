"""Losses: of the classifier (`cge`, `softmax`), of the features (`metric`), and their sum (`criterion`)."""
