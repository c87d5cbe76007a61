"""The paper's study of what bags can teach."""
