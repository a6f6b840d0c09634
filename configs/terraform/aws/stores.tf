resource "aws_efs_file_system" "weights" {
  encrypted       = true
  throughput_mode = "elastic" # FLUX is 34 GB, read by each node that starts
  tags            = { Name = "${var.name}-weights" }
}

resource "aws_efs_mount_target" "weights" {
  count           = length(var.zones)
  file_system_id  = aws_efs_file_system.weights.id
  subnet_id       = aws_subnet.nodes[count.index].id
  security_groups = [aws_security_group.stores.id]
}

resource "aws_s3_bucket" "results" {
  bucket_prefix = "${var.name}-results-"
}

resource "aws_s3_bucket_public_access_block" "results" {
  bucket                  = aws_s3_bucket.results.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_lifecycle_configuration" "results" {
  bucket = aws_s3_bucket.results.id
  rule {
    id     = "cut-uploads"
    status = "Enabled"
    filter {}
    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }
}

# Jobs and the state of Ray's head are in separate stores: neither fills the other's memory. ElastiCache writes no
# append-only file; each store has a copy in another zone and a snapshot a day. Cluster mode stays off: the
# service's transactions touch several keys, and Ray takes a single shard.
resource "random_password" "store" {
  for_each = toset(["app", "ray"])
  length   = 32
  special  = false # part of a URL
}

resource "random_password" "api_key" {
  length  = 40
  special = false
}

resource "random_password" "jwt_secret" {
  length  = 48
  special = false
}

locals {
  stores = {
    jobs = {
      user   = "app"
      type   = var.store_type
      access = "on resetchannels ~weft:* &weft:* -@all +@connection +@transaction +@read +@write +@pubsub +time +ping -@scripting -@dangerous -@admin -keys -sort -restore -migrate -flushall -flushdb +info"
    }
    state = {
      user   = "ray"
      type   = "cache.t4g.small"
      access = "on resetchannels ~RAY* ~DUMMY -@all +@connection +@read +@write +@transaction +@scripting +info -flushall -flushdb"
    }
  }
  addresses = { for name, store in aws_elasticache_replication_group.store : name => store.primary_endpoint_address }
}

resource "aws_elasticache_user" "disabled" {
  user_id       = "${var.name}-disabled"
  user_name     = "default" # each group must have it
  engine        = "valkey"
  access_string = "off -@all"
  authentication_mode {
    type = "no-password-required"
  }
}

resource "aws_elasticache_user" "store" {
  for_each      = local.stores
  user_id       = "${var.name}-${each.value.user}"
  user_name     = each.value.user
  engine        = "valkey"
  access_string = each.value.access
  authentication_mode {
    type      = "password"
    passwords = [random_password.store[each.value.user].result]
  }
}

resource "aws_elasticache_user_group" "store" {
  for_each      = local.stores
  user_group_id = "${var.name}-${each.key}"
  engine        = "valkey"
  user_ids      = [aws_elasticache_user.disabled.user_id, aws_elasticache_user.store[each.key].user_id]
}

resource "aws_elasticache_subnet_group" "stores" {
  name       = "${var.name}-stores"
  subnet_ids = aws_subnet.nodes[*].id
}

resource "aws_elasticache_parameter_group" "stores" {
  name   = "${var.name}-stores"
  family = "valkey8"
  parameter {
    name  = "maxmemory-policy"
    value = "noeviction" # full: jobs are refused; nothing that was accepted is dropped
  }
}

resource "aws_elasticache_replication_group" "store" {
  for_each                   = local.stores
  replication_group_id       = "${var.name}-${each.key}"
  description                = "Weft: ${each.key}"
  engine                     = "valkey"
  engine_version             = "8.0"
  node_type                  = each.value.type
  num_cache_clusters         = 2
  automatic_failover_enabled = true
  multi_az_enabled           = true
  parameter_group_name       = aws_elasticache_parameter_group.stores.name
  subnet_group_name          = aws_elasticache_subnet_group.stores.name
  security_group_ids         = [aws_security_group.stores.id]
  user_group_ids             = [aws_elasticache_user_group.store[each.key].user_group_id]
  transit_encryption_enabled = true
  at_rest_encryption_enabled = true
  snapshot_retention_limit   = 7
}
