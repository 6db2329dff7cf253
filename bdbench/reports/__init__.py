"""What evaluations say: tables, ranking, pictures, and the report's page."""
