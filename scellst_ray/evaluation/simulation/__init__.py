"""The paper's simulation study: how well heads trained on bags predict single cells."""
