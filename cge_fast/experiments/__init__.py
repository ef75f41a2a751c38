"""The paper's tables and figures, each row by one training: python -m cge_fast.experiments --help"""
