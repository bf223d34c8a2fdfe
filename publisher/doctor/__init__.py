"""Diagnosis of servers, logs and replicas."""
