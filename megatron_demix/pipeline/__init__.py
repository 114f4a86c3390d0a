"""The method as stages: a DAG of artifacts, each made once from the artifacts it needs."""
