# What `ray up configs/clusters/gcp.yaml` needs on Google's cloud: a network and its firewall, the file system of the
# weights, the bucket of results with its keys, and two Redises, for the jobs and for the state of Ray's head. Run
# book: docs/operations.md.
terraform {
  required_version = ">= 1.6"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 6.0, < 8.0"
    }
    random = {
      source  = "hashicorp/random"
      version = "~> 3.6"
    }
  }
}

provider "google" {
  project = var.project
  region  = var.region
}

variable "project" {
  type = string
}

variable "name" {
  description = "Prefix of all names."
  type        = string
  default     = "weft"
}

variable "region" {
  type    = string
  default = "us-central1"
}

variable "zone" {
  description = "One that offers the machine types of configs/clusters/gcp.yaml."
  type        = string
  default     = "us-central1-a"
}

variable "admins" {
  description = "Networks that reach the nodes by SSH, as `ray up` does: [\"203.0.113.7/32\"]."
  type        = list(string)
  validation {
    condition     = !contains(var.admins, "0.0.0.0/0")
    error_message = "SSH is not for everybody: name your own network."
  }
}

variable "callers" {
  description = "Networks that reach HTTPS on the head."
  type        = list(string)
  default     = ["0.0.0.0/0"]
}

variable "image" {
  description = "Image of all nodes; null: that of configs/clusters/gcp.yaml."
  type        = string
  default     = null
}

variable "max_workers" {
  type    = number
  default = 16
}

variable "store_gb" {
  description = "Memory of the Redis with the jobs. Sizing: docs/operations.md."
  type        = number
  default     = 5
}

resource "google_compute_network" "weft" {
  name                    = var.name
  auto_create_subnetworks = false
}

resource "google_compute_subnetwork" "nodes" {
  name                     = "${var.name}-nodes"
  network                  = google_compute_network.weft.id
  ip_cidr_range            = "10.64.0.0/20"
  private_ip_google_access = true
}

locals {
  node_tag = "${var.name}-node"
  head_tag = "${var.name}-head"
}

resource "google_compute_firewall" "nodes" {
  name        = "${var.name}-nodes"
  description = "Ray trusts its nodes: all ports, nodes only"
  network     = google_compute_network.weft.id
  source_tags = [local.node_tag]
  target_tags = [local.node_tag]
  allow {
    protocol = "all"
  }
}

resource "google_compute_firewall" "ssh" {
  name          = "${var.name}-ssh"
  network       = google_compute_network.weft.id
  source_ranges = var.admins
  target_tags   = [local.node_tag]
  allow {
    protocol = "tcp"
    ports    = ["22"]
  }
}

resource "google_compute_firewall" "https" {
  name          = "${var.name}-https"
  network       = google_compute_network.weft.id
  source_ranges = var.callers
  target_tags   = [local.head_tag]
  allow {
    protocol = "tcp"
    ports    = ["443"]
  }
}

resource "google_compute_firewall" "certificates" {
  name          = "${var.name}-certificates"
  description   = "Let's Encrypt asks from anywhere"
  network       = google_compute_network.weft.id
  source_ranges = ["0.0.0.0/0"]
  target_tags   = [local.head_tag]
  allow {
    protocol = "tcp"
    ports    = ["80"]
  }
}

resource "google_filestore_instance" "weights" {
  name     = "${var.name}-weights"
  location = var.zone
  tier     = "ZONAL" # FLUX is 34 GB, read by each node that starts
  file_shares {
    name        = "models"
    capacity_gb = 1024
  }
  networks {
    network = google_compute_network.weft.name
    modes   = ["MODE_IPV4"]
  }
}

resource "google_storage_bucket" "results" {
  name                        = "${var.project}-${var.name}-results"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
}

resource "google_service_account" "results" {
  account_id   = "${var.name}-results"
  display_name = "Weft: files of jobs"
}

resource "google_storage_bucket_iam_member" "results" {
  bucket = google_storage_bucket.results.name
  role   = "roles/storage.objectUser"
  member = "serviceAccount:${google_service_account.results.email}"
}

resource "google_storage_hmac_key" "results" { # the bucket speaks S3
  service_account_email = google_service_account.results.email
}

resource "random_password" "api_key" {
  length  = 40
  special = false
}

resource "random_password" "jwt_secret" {
  length  = 48
  special = false
}

# Jobs and the state of Ray's head are in separate stores: neither fills the other's memory. Memorystore writes no
# append-only file and knows one password, no users; each store has a copy in another zone and hourly snapshots.
resource "google_redis_instance" "store" {
  for_each           = { jobs = var.store_gb, state = 1 }
  name               = "${var.name}-${each.key}"
  region             = var.region
  tier               = "STANDARD_HA"
  memory_size_gb     = each.value
  redis_version      = "REDIS_7_2"
  auth_enabled       = true
  authorized_network = google_compute_network.weft.id
  redis_configs = {
    maxmemory-policy = "noeviction" # full: jobs are refused; nothing that was accepted is dropped
  }
  persistence_config {
    persistence_mode    = "RDB"
    rdb_snapshot_period = "ONE_HOUR"
  }
}

module "cluster_file" {
  source      = "./cluster_file"
  project     = var.project
  region      = var.region
  zone        = var.zone
  image       = var.image
  subnetwork  = google_compute_subnetwork.nodes.self_link
  node_tag    = local.node_tag
  head_tag    = local.head_tag
  weights     = google_filestore_instance.weights.networks[0].ip_addresses[0]
  max_workers = var.max_workers
}

output "cluster_yaml" {
  description = "For `ray up`: terraform output -raw cluster_yaml > ../../../gcp.yaml"
  value       = module.cluster_file.yaml
}

output "environment" {
  description = "For .env: terraform output -raw environment > ../../../.env; add WEFT_PUBLIC_URL and HF_TOKEN."
  sensitive   = true
  value       = <<-EOT
    REDIS_URL=redis://:${google_redis_instance.store["jobs"].auth_string}@${google_redis_instance.store["jobs"].host}:6379
    RAY_REDIS_ADDRESS=${google_redis_instance.store["state"].host}:6379
    RAY_REDIS_PASSWORD=${google_redis_instance.store["state"].auth_string}
    S3_BUCKET_NAME=${google_storage_bucket.results.name}
    S3_REGION=${var.region}
    S3_ENDPOINT_URL=https://storage.googleapis.com
    WEFT_AWS_ACCESS_KEY_ID=${google_storage_hmac_key.results.access_id}
    WEFT_AWS_SECRET_ACCESS_KEY=${google_storage_hmac_key.results.secret}
    WEFT_API_KEY=${random_password.api_key.result}
    WEFT_JWT_SECRET=${random_password.jwt_secret.result}
    WEFT_TRUSTED_PROXIES=127.0.0.1
  EOT
}
