"""What models call their modules: tables between the names of one model in different libraries."""
